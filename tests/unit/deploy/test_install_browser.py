"""scripts/install_browser.sh: a browser counts when it starts. Programs are fakes in a tree of its own."""

import os
import shutil
import subprocess

import pytest

from tests.support.gateway import REPOSITORY

STUB = "#!/bin/sh\necho 'Please install the chromium snap' >&2\nexit 1\n"
CHROMIUM = "#!/bin/sh\necho Chromium 1.2.3\n"
# Puts `own` where Playwright puts its Chromium, and names packages.
PLAYWRIGHT = """#!/bin/sh
if [ "$1" = install-deps ]; then echo libnss3; exit; fi
mkdir -p "$PLAYWRIGHT_BROWSERS_PATH/a/b"
cp own "$PLAYWRIGHT_BROWSERS_PATH/a/b/chrome-headless-shell"
"""


@pytest.fixture
def install(tmp_path):
    """Runs the script where `installed` are the programs on the path and `own` is Playwright's Chromium."""

    def run(own, **installed):
        for name, text in {
            ".venv/bin/playwright": PLAYWRIGHT,
            "bin/id": "#!/bin/sh\necho 1000\n",  # nobody who may install packages
            "own": own,
            **{f"bin/{program.replace('_', '-')}": text for program, text in installed.items()},
        }.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        for name in ("bash", "cp", "dirname", "find", "head", "mkdir"):
            (tmp_path / "bin" / name).symlink_to(shutil.which(name))
        (tmp_path / "scripts").mkdir()
        script = shutil.copy(REPOSITORY / "scripts" / "install_browser.sh", tmp_path / "scripts")
        environment = {**os.environ, "PATH": str(tmp_path / "bin")}
        return subprocess.run(
            ["/bin/bash", script], env=environment, capture_output=True, text=True, check=False
        )

    return run


def test_an_installed_browser_that_starts_is_enough(install, tmp_path):
    assert install(STUB, google_chrome=CHROMIUM).returncode == 0
    assert not (tmp_path / ".venv/browsers").exists()


def test_a_stub_is_no_browser(install, tmp_path):
    assert install(CHROMIUM, chromium_browser=STUB).returncode == 0
    assert (tmp_path / ".venv/browsers").exists()


def test_a_browser_without_its_libraries_fails_and_names_packages(install):
    failed = install(STUB)
    assert failed.returncode == 1
    assert "Please install the chromium snap" in failed.stderr
    assert "sudo .venv/bin/playwright install-deps" in failed.stderr
    assert "libnss3" in failed.stderr
