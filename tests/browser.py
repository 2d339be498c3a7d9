"""Headless Chromium for tests, by its DevTools protocol over a pipe: nothing but the browser itself is needed.

On Debian: apt-get install -y chromium
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOW = "needs a browser: apt-get install -y chromium"


class Browser:
    """One page in a browser of its own; `errors` lists what its console complained of."""

    def __init__(self, page: Path, width: int = 1280, height: int = 900, *, dark: bool = False) -> None:
        assert PROGRAM is not None
        self.errors: list[str] = []
        self._folder, self._numbers = tempfile.TemporaryDirectory(prefix="relssl-browser-"), itertools.count(1)
        there, self._out = os.pipe()
        self._in, back = os.pipe()
        flags = (
            f"--headless --no-sandbox --disable-gpu --hide-scrollbars --remote-debugging-pipe --user-data-dir={self._folder.name}"
        )
        command = f"exec {PROGRAM} {flags} about:blank 3<&{there} 4>&{back}"
        silent: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(["bash", "-c", command], pass_fds=(there, back), **silent)
        os.close(there)
        os.close(back)
        self._rest, self._session = b"", None
        target = next(each for each in self("Target.getTargets")["targetInfos"] if each["type"] == "page")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self(f"{domain}.enable")
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])
        start = time.perf_counter()
        self("Page.navigate", url=page.resolve().as_uri())
        while self.js("document.readyState") != "complete":
            time.sleep(0.02)
        self.seconds = time.perf_counter() - start  # until everything was drawn for the first time

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._out)  # at which the browser ends
        self._process.wait(timeout=30)
        os.close(self._in)
        self._folder.cleanup()

    def __call__(self, method: str, **parameters: Any) -> Any:
        """Call the protocol, and return its answer."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                data = os.read(self._in, 1 << 20)
                assert data, "the browser has ended"
                self._rest += data
            line, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(json.dumps(answer["params"])[:500])

    def js(self, expression: str) -> Any:
        """Evaluate JavaScript in the page, and return its value."""
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def text(self, selector: str) -> str:
        return str(self.js(f"document.querySelector({json.dumps(selector)}).textContent"))

    def click(self, selector: str) -> None:
        """Click in the middle of an element, as a mouse does."""
        code = "(() => {const e = document.querySelector(%s); e.scrollIntoView({block: 'center'}); const b = e.getBoundingClientRect();"
        x, y = self.js((code + "return [b.x + b.width / 2, b.y + b.height / 2];})()") % json.dumps(selector))
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="none" if kind == "mouseMoved" else "left", clickCount=1)

    def press(self, key: str, code: int) -> None:
        """Press a key by its name and its number."""
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def focus(self, selector: str) -> None:
        self.js(f"document.querySelector({json.dumps(selector)}).focus()")
