"""An RTSP camera on loopback: GStreamer's RTSP server with a test picture that moves, run by the system's Python.

    /usr/bin/python3 rtsp_server.py PORT WIDTHxHEIGHT FPS [USER:PASSWORD]

Prints "ready PORT" once it listens (PORT 0: one that is free). SIGUSR1 halves the resolution while it is running.
"""

import signal
import sys

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402

PIPELINE = (
    "( videotestsrc is-live=true pattern=ball background-color=0xff404040 ! capsfilter name=size caps={caps} ! "
    "x264enc tune=zerolatency speed-preset=ultrafast key-int-max=10 bitrate=500 threads=1 ! "
    "rtph264pay name=pay0 pt=96 config-interval=-1 )"
)


def caps(size, fps):
    return f"video/x-raw,format=I420,width={size[0]},height={size[1]},framerate={fps}/1"


def require_login(server, factory, login):
    user, password = login.split(":")
    auth, token = GstRtspServer.RTSPAuth(), GstRtspServer.RTSPToken()
    token.set_string("media.factory.role", "viewer")
    auth.add_basic(GstRtspServer.RTSPAuth.make_basic(user, password), token)
    server.set_auth(auth)
    permissions = GstRtspServer.RTSPPermissions()
    for permission in ("media.factory.access", "media.factory.construct"):
        permissions.add_permission_for_role("viewer", permission, True)
    factory.set_permissions(permissions)


def main():
    port, size, fps, *login = sys.argv[1:]
    size = [int(side) for side in size.split("x")]
    Gst.init(None)
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(port)
    factory = GstRtspServer.RTSPMediaFactory()
    factory.set_launch(PIPELINE.format(caps=caps(size, fps)))
    factory.set_shared(True)
    medias = []
    factory.connect("media-configure", lambda _, media: medias.append(media))
    if login:
        require_login(server, factory, login[0])
    server.get_mount_points().add_factory("/camera", factory)
    server.attach(None)

    def halve():
        half = Gst.Caps.from_string(caps([side // 2 for side in size], fps))
        for media in medias:
            media.get_element().get_by_name("size").set_property("caps", half)
        return True

    GLib.unix_signal_add(GLib.PRIORITY_DEFAULT, signal.SIGUSR1, halve)
    print("ready", server.get_bound_port(), flush=True)
    GLib.MainLoop().run()


main()
