"""Kernels compiled ahead of time, in the artifact store: ``esper-fx kernels build`` puts them there, launches find them."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from esper_fx.cache import ArtifactStore, KernelKey
from esper_fx.errors import StoreError
from esper_fx.kernels.launch import before_first_launch
from esper_fx.kernels.prebuilt import Binary, install, pack
from esper_fx.settings import settings

logger = logging.getLogger(__name__)

#: What an entry's metadata says that it is.
KIND = "triton kernel"


def put_binaries(store: ArtifactStore, identity: dict[str, str], binaries: Iterable[Binary]) -> int:
    """Store all binaries of a kernel for a target, in place of those that were there; returns their bytes.

    Args:
        store: Where to.
        identity: What they depend on besides arguments and options.
        binaries: The kernel, compiled for different arguments and options.

    Raises:
        StoreError: They could not be written.
    """
    data = pack(binaries)
    target = identity["target"].rpartition(":")[0]  # without the warp size: as on the command line
    store.put(_key(identity), data, metadata={"kind": KIND, "kernel": identity["kernel"], "target": target})
    return len(data)


def install_binaries(kernel: Any) -> int:
    """Hand the binaries of a kernel that are stored for the current device to Triton, so that it need not compile.

    Whatever is wrong with them is logged and not raised: a kernel that is not installed is compiled.

    Returns:
        How many Triton did not have before.
    """
    try:
        from esper_fx.kernels import _triton

        target = _triton.current_target() if settings().store else None
        if target is None:
            return 0
        data = ArtifactStore(settings().cache_dir, create=False).get(_key(_triton.identity(kernel, target)))
        return install(data, target) if data is not None else 0
    except StoreError as error:  # often there is none yet
        logger.debug("no prebuilt kernels: %s", error)
    except Exception as error:
        logger.warning("prebuilt binaries of %s are not used: %s: %s", kernel.__name__, type(error).__name__, error)
    return 0


def _key(identity: dict[str, str]) -> KernelKey:
    return KernelKey.of(kind=KIND, **identity)


before_first_launch(install_binaries)
