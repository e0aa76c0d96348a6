"""What nvcc makes of the CUDA kernels, without a GPU: no spills, wide loads, fp64 multiply-adds; and docs/ says so.

Warnings of spills and of local memory are errors where the kernels are compiled (cuda_static/toolkit.py).
"""

from __future__ import annotations

import pytest
from cuda_static import document, estimate, toolkit
from cuda_static.toolkit import LOCAL, WIDE_LOAD, WIDE_STORE, count

MISSING = toolkit.missing()
pytestmark = [pytest.mark.toolkit, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]

KERNELS = {"gram<4>", "gram<8>", "cores<false>", "cores<true>", "svd", "transforms", "truncate"}
READ_WIDE = {"gram<4>", "gram<8>", "truncate"}
WRITE_WIDE = {"truncate"}


def test_every_kernel_is_compiled_for_every_architecture() -> None:
    expected = {(kernel, architecture) for kernel in KERNELS for architecture in toolkit.architectures()}
    assert toolkit.resources().keys() == toolkit.code().keys() == expected
    assert set(toolkit.architectures()) == toolkit.DEVICES.keys()


def test_no_local_memory() -> None:
    assert all(used.stack == used.spills == 0 for used in toolkit.resources().values())
    assert not [key for key, code in toolkit.code().items() if count(code, LOCAL)]


@pytest.mark.parametrize(
    ("kernels", "pattern"), [(KERNELS, "DFMA"), (READ_WIDE, WIDE_LOAD), (WRITE_WIDE, WIDE_STORE)], ids=lambda x: str(x)
)
def test_instructions(kernels: set[str], pattern: str) -> None:
    assert not [key for key, code in toolkit.code().items() if key[0] in kernels and not count(code, pattern)]


def test_every_launch_fits() -> None:
    resources = toolkit.resources()
    for architecture in toolkit.architectures():
        for r in (1, 2, 7, *range(8, 260, 4), 1000):
            launches = toolkit.launches([(300, 200, r, max(r // 4, 1))], 4, architecture)
            assert {"gram", "cores", "transforms", "truncate"} <= {x.kernel.split("<")[0] for x in launches}
            for launch in launches:
                used = resources[launch.kernel, architecture]
                assert toolkit.blocks_per_multiprocessor(architecture, used, launch) > 0, (architecture, r, launch)


def test_a_whole_adapter_takes_five_launches() -> None:
    for r in (16, 64):
        names = [x.kernel.split("<")[0] for x in toolkit.launches(estimate.Adapter(r, 4).modules, 4, 90)]
        assert names == ["gram", "cores", "svd", "transforms", "truncate"]


def test_conflicts_of_banks() -> None:
    assert estimate.wavefronts([8 * lane for lane in range(32)], 8) == 2
    assert estimate.wavefronts([0] * 32, 8) == 2
    assert estimate.wavefronts([256 * lane for lane in range(32)], 8) == 32
    assert estimate.wavefronts([16 * lane for lane in range(32)], 16) == 4


def test_docs_say_what_was_compiled() -> None:
    stale = [path.name for path, text in document.documents().items() if path.read_text() != text]
    assert not stale, f"{', '.join(stale)}: out of date, run `make cuda-static`"
