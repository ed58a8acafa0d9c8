"""A browser without a screen: Debian's Chromium, driven by playwright-core, with axe-core to judge a page.

``python tests/rig/browser.py --install`` installs the Debian packages that are missing (as root) and
fetches the two npm packages into the cache folder; without ``--install`` nothing outside of the
cache folder is touched.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
from rig.arm import cache_folder, install_debian

PACKAGES = {"chromium": "chromium", "node": "nodejs", "npm": "npm"}
"""The program that is needed, and the Debian package that has it."""
MODULES = ("playwright-core@1.65.1", "axe-core@4.14.1")
PROGRAM = Path(__file__).with_name("look.mjs")
MOST_SECONDS = 300.0


def place() -> Path:
    """Where the npm packages are, or will be."""
    return cache_folder() / "-".join(module.replace("@", "-") for module in MODULES)


def missing() -> list[str]:
    """What a test needs and is not there, with the command that brings it; empty when the rig can run."""
    lacking = [f"the program {program} (Debian: {package})" for program, package in _absent().items()]
    if not place().is_dir():
        lacking.append(f"the folder {place()}")
    return [f"{what} is missing: run `python tests/rig/browser.py --install`" for what in lacking]


def _absent() -> dict[str, str]:
    return {program: package for program, package in PACKAGES.items() if not shutil.which(program)}


def make() -> Path:
    """The npm packages, fetched if they are not there. A failed attempt leaves nothing behind."""
    if not place().is_dir():
        place().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place().parent, prefix="making-") as scratch:
            made = Path(scratch) / "modules"
            made.mkdir()
            command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix", str(made)]
            subprocess.run([*command, *MODULES], check=True, stdout=sys.stderr)
            made.rename(place())
    return place()


def look(
    address: str, width: int, scheme: str, picture: Path, *, press: str = "", until: str = ""
) -> dict[str, Any]:
    """Open ``address`` in a window of ``width`` pixels, light or dark; the whole page goes into ``picture``.

    ``press`` is the selector of a button to press, ``until`` of what must be there before the page is judged.
    Gives ``messages`` of console and errors, ``scroll_width``, ``charts`` (each one's title, size and
    number of drawn marks), ``violations`` that axe-core calls serious or critical, and ``text``,
    ``isolated`` and the HTTP ``status``.

    Raises:
        subprocess.CalledProcessError: the page cannot be opened, or what was waited for did not come.
    """
    task = {
        "address": address, "width": width, "scheme": scheme, "picture": str(picture), "press": press,
        "until": until, "modules": str(place() / "node_modules"), "chromium": shutil.which("chromium"),
    }  # fmt: skip
    command = ["node", str(PROGRAM), json.dumps(task)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=MOST_SECONDS)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> int:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--install", action="store_true", help="apt-get what is missing; needs root")
    if parser.parse_args().install:
        install_debian(_absent().values())
    if absent := _absent():
        sys.stderr.write(f"missing: {', '.join(absent)}; as root: python tests/rig/browser.py --install\n")
        return 1
    sys.stdout.write(f"{make()}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
