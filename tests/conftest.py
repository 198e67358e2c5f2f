"""Shared fixtures: where the golden and public data lie, and a home that is not the user's."""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

import chatbind_cli

ROOT = Path(__file__).resolve().parent.parent
_COUNT = itertools.count()
_SLOW = ("training", "inference", "serving", "e2e", "toy")

# Tiny models run fastest on one thread, and the suite runs in as many processes as there are
# cores. Children inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts background jobs with Ctrl-C ignored, and children inherit that; the programs that
# tests interrupt are to be as a terminal starts them.
signal.signal(signal.SIGINT, signal.default_int_handler)

# An installer puts `commands/` below the package. In a checkout it stands beside it, so that the
# package is told of it here, whatever else is installed; `__main__` does the same.
if not (Path(chatbind_cli.__file__).parent / "commands").is_dir():
    chatbind_cli.__path__.append(str(ROOT))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow files first: one that comes last leaves all cores but its own idle."""
    items.sort(key=lambda item: item.path.relative_to(ROOT / "tests").parts[0] not in _SLOW)


def pytest_collection_finish() -> None:
    """Spares the collector what all tests and libraries are made of: 6 to 9 % of some tests' time.

    It would walk through it again and again, and copy it in every fork.
    """
    gc.collect()
    gc.freeze()


def _shared(name: str) -> Path:
    folder = ROOT.parent / "shared" / name
    if not folder.is_dir():
        pytest.skip(f"needs the folder ../shared/{name}, which is not part of the project")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    """Numbers computed with the reference implementations."""
    return _shared("golden")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Public files as they were published."""
    return _shared("data")


@pytest.fixture(scope="session")
def quick_world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder and the records of `chatbind toy DIR --quick`; read only: change a copy.

    Made once for all tests, in whichever of the suite's processes they run.
    """
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, log = base / "quick-world", base / "quick-world.jsonl"
    environment = {**os.environ, "XDG_CACHE_HOME": str(base / "quick-cache"), "HF_HUB_OFFLINE": "1"}
    with FileLock(base / "quick-world.lock"):
        if not log.exists():
            words = [sys.executable, "-m", "chatbind_cli", "toy", str(folder), "--quick"]
            done = subprocess.run(words, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            log.write_text(done.stdout)
    return folder, [json.loads(line) for line in log.read_text().splitlines()]


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium, driven through its own driver; a test leaves it as it was."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    driver_path = shutil.which("chromedriver")
    if chromium is None or driver_path is None:
        pytest.skip("needs chromium and chromedriver (apt: chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
        "--window-size=1280,900",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver_path))
    yield driver
    driver.quit()


@pytest.fixture(scope="session", autouse=True)
def _home_of_fixtures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The same for fixtures that several tests share."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        home = tmp_path_factory.getbasetemp() / "home"
        monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        yield


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's caches, history, tokens or settings."""
    home = tmp_path_factory.getbasetemp() / "home"
    # of each test: what one has cached, another must not find
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / f"cache-{next(_COUNT)}"))
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    slurm = [name for name in os.environ if name.startswith("SLURM")]
    for name in ("OPENAI_API_KEY", "HF_TOKEN", "CHATBIND_DEBUG", *slurm):
        monkeypatch.delenv(name, raising=False)
