"""The web page of a running stream: live pictures, counters, and the controls of the fusion policy.

`PageServer` serves it; `runtime.sinks.web` makes it a sink. It needs nothing but the standard library, and the page
loads nothing from elsewhere.
"""
