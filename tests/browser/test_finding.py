"""Where the browser comes from: the PATH, else Debian's package, else Playwright; else it is said and skipped."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import finding
import pytest

pytestmark = pytest.mark.browser


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of which one can say what is on its PATH, who works on it, and what its commands bring."""
    here = SimpleNamespace(path={}, brings={}, commands=[], own=tmp_path / "chrome", root=True)

    def attempt(command, seconds=600):
        here.commands.append(command[-1])
        here.path |= here.brings.get(command[-1], {})
        if here.brings.get("own") and "playwright" in command:
            here.own.touch()

    monkeypatch.setattr(finding, "attempt", attempt)
    monkeypatch.setattr(finding.shutil, "which", lambda name: here.path.get(name))
    monkeypatch.setattr(finding.os, "geteuid", lambda: 0 if here.root else 1000)
    here.chromium = SimpleNamespace(
        executable_path=str(here.own), launch=lambda executable_path="own", args=(): executable_path
    )
    return here


def test_a_browser_on_the_path_is_taken(machine):
    machine.path = {"google-chrome": "/opt/chrome", "apt-get": "/usr/bin/apt-get"}
    assert finding.launch(machine.chromium) == "/opt/chrome"
    assert machine.commands == []


def test_debians_package_comes_next(machine):
    machine.path = {"apt-get": "/usr/bin/apt-get"}
    machine.brings = {"chromium": {"chromium": "/usr/bin/chromium"}}
    assert finding.launch(machine.chromium) == "/usr/bin/chromium"
    assert machine.commands == ["update", "chromium"]


@pytest.mark.parametrize("apt", [{}, {"apt-get": "/usr/bin/apt-get"}])
def test_playwrights_own_is_fetched_where_apt_may_not_install(machine, apt):
    machine.path, machine.root, machine.brings = apt, False, {"own": True}
    assert finding.launch(machine.chromium) == "own"
    assert machine.commands == ["chromium"]


def test_playwrights_own_is_not_fetched_twice(machine):
    machine.own.touch()
    assert finding.launch(machine.chromium) == "own"
    assert machine.commands == []


def test_without_any_the_tests_are_skipped_and_fail_where_all_has_to_be_tested(machine, monkeypatch):
    assert finding.launch(machine.chromium) is None
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no browser"):
        finding.missing("no browser")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="CI=true"):
        finding.missing("no browser")


def test_a_command_that_hangs_is_given_up(monkeypatch):
    finding.attempt([sys.executable, "-c", "import time; time.sleep(60)"], seconds=0.2)
    finding.attempt([sys.executable, "-c", "raise SystemExit(3)"])
