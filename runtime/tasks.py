"""The four fusion tasks and what their two sources are."""

# task -> what source a and source b are
TASKS: dict[str, tuple[str, str]] = {
    "ivif": ("infrared", "visible"),
    "mif": ("CT, PET or SPECT", "MRI"),
    "mfif": ("near focus", "far focus"),
    "meif": ("under-exposed", "over-exposed"),
}
