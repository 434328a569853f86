"""The verb that says what this machine has."""

from __future__ import annotations

from had_pipe import __version__
from had_pipe.cli.arguments import JsonOption
from had_pipe.cli.shown import answering, count, print_facts, print_json
from had_pipe.sizes import size

_PACKAGES = ("torch", "transformers", "safetensors", "zarr", "numpy", "pydantic")
_EXTRA_PACKAGES = {
    "gtars": "extract",
    "dnaio": "extract",
    "py2bit": "extract",
    "dask": "extract",
    "distributed": "extract",
    "obstore": "remote",
    "flash-linear-attention": "cuda",
    "triton": "cuda",
}


@answering
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine has.

    Versions, devices, which kernels run and why, and what is kept of caches behind URLs.
    """
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from had_pipe.cache.mirror import mirror_folder, mirror_usage
    from had_pipe.students.delta_rule import kernel

    found: dict[str, str | None] = {}
    for package in (*_PACKAGES, *_EXTRA_PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    cuda = {
        f"cuda:{index}": torch.cuda.get_device_properties(index)
        for index in range(torch.cuda.device_count())
    }
    devices = {name: {"name": p.name, "nbytes": p.total_memory} for name, p in cuda.items()}
    kernels = {}
    for device in ("cpu", *devices):
        chosen = kernel(device)
        kernels[device] = {"name": chosen.name, "reason": chosen.reason}
    folder = mirror_folder()
    caches, held = mirror_usage(folder)
    if as_json:
        print_json(
            {
                "had_pipe": __version__,
                "python": platform.python_version(),
                "platform": platform.platform(),
                "packages": found,
                "threads": torch.get_num_threads(),
                "devices": devices,
                "delta_rule": kernels,
                "mirror": {"folder": str(folder), "caches": caches, "nbytes": held},
            }
        )
        return
    packages = []
    for package, number in found.items():
        extra = _EXTRA_PACKAGES.get(package, "")
        packages.append((package, number or f"not installed: pip install 'had-pipe[{extra}]'"))
    print_facts(
        [
            ("had-pipe", __version__),
            ("Python", f"{platform.python_version()}, {platform.platform()}"),
            *packages,
            ("cpu", f"{torch.get_num_threads()} threads for torch"),
            *((name, f"{p.name}, {size(p.total_memory)}") for name, p in cuda.items()),
            *([] if cuda else [("cuda", "no device")]),
            *(
                ("delta rule", f"{k['name']} on {device}: {k['reason']}")
                for device, k in kernels.items()
            ),
            ("mirror", f"{folder}, {size(held)} of {count(caches, 'cache')}"),
        ]
    )
