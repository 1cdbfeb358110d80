"""What the plugin refuses, for which it needs no daemon; `test_daemon.py` has the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]


def refused(pytester: pytest.Pytester, marker: str, *options: str) -> str:
    """What is told of a test with this marker."""
    pytester.makepyfile(f"import pytest\n\n{marker}\ndef test_it(snapback_vm): pass\n")
    socket = pytester.path / "none"
    result = pytester.runpytest_subprocess("-o", f"snapback_socket={socket}", *options)
    result.assert_outcomes(errors=1)
    return result.stdout.str()


def test_no_pool(pytester: pytest.Pytester) -> None:
    assert "ini option snapback_pool" in refused(pytester, "")


@pytest.mark.parametrize(
    "marker, told",
    [
        ('scope="package"', "scope='package'"),
        ('reset="always"', "reset='always'"),
        ('image="vm.snap"', "knows no image"),
        ('"one", "two"', "one argument"),
    ],
)
def test_markers_that_make_no_sense(marker: str, told: str, pytester: pytest.Pytester) -> None:
    pool = "-osnapback_pool=booted"
    assert told in refused(pytester, f"@pytest.mark.snapback({marker})", pool)


def test_no_daemon(pytester: pytest.Pytester) -> None:
    told = refused(pytester, '@pytest.mark.snapback("booted")')
    assert "start the daemon" in told, told
    assert "_transport.py" not in told and "another exception" not in told, told


def test_a_timeout_that_is_no_number(pytester: pytest.Pytester) -> None:
    told = refused(pytester, '@pytest.mark.snapback("booted")', "-osnapback_timeout=soon")
    assert "number of seconds" in told


def test_the_marker_is_explained(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_subprocess("--markers")
    result.stdout.fnmatch_lines(
        ["@pytest.mark.snapback(pool=*scope: function, class*reset: before, *"]
    )


def test_the_package_needs_no_pytest(tmp_path: Path) -> None:
    # A pytest that can't be imported.
    (tmp_path / "pytest.py").write_text("raise ImportError('pytest was imported')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    program = "import snapback; snapback.Client('/none')"
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=60)
