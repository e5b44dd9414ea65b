"""Arguments that are public and not in this version."""


def require_default(**arguments: tuple[object, object]) -> None:
    """Check that arguments which this version only knows by name have their default, {name: (value, default)}.

    Raises:
        NotImplementedError: one has not; the message names it.
    """
    for name, (value, default) in arguments.items():
        if value != default:
            raise NotImplementedError(f"{name}={value!r} is not part of this version; leave it at {default!r}")
