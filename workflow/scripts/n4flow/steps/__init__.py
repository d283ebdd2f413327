"""One function per rule: files in, files out."""


def preload() -> None:
    """What makes the first estimate slow, for a process that is to do many; of the steps that have this name."""
    from n4flow import kernels
    from n4flow.study.provenance import remember_package

    kernels.preload()
    remember_package()
