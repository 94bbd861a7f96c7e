"""Numbers with units, written the way people read them."""

KIB, MIB, GIB = 2**10, 2**20, 2**30


def format_bytes(num_bytes: float) -> str:
    """Bytes in the largest binary unit that keeps the number at least 1: `17.9 GiB`."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(num_bytes) >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    return f"{num_bytes:.0f} B"


def format_s(seconds: float) -> str:
    """Seconds as `0.42 s`, `42 s`, `3 min 05 s`, `2 h 07 min` or `12 days`."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest_s = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest_s:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours / 24:.0f} days"
    return f"{hours} h {minutes:02d} min"


def format_count(number: float) -> str:
    """A count with a metric suffix: `134.5M`, `7.2k`, `312`."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= unit:
            return f"{number / unit:.1f}{name}"
    return f"{number:.0f}"
