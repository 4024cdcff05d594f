"""The built site in a real browser: ``python tools/docs_check.py docs/_build``.

Serves the folder to a headless Chromium, which opens every page and says whether it has a heading and whether all its
pictures are there, and then searches for some names as a reader would. Needs chromium (``apt-get install chromium``).
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

# What is searched for, and a page that has to be among those found.
SEARCHES = {
    "Milstein": "generated/api/sdesolve.Milstein",
    "BrownianPath": "generated/api/sdesolve.BrownianPath",
    "torchrun": "many_machines",
    "fused gradient": "gradients",
    "Wasserstein": "generated/api/sdesolve.metrics.sliced_wasserstein",
}
SCRIPT = """
<iframe id="view" width="1200" height="900"></iframe>
<script>
const view = document.getElementById("view"), wait = ms => new Promise(done => setTimeout(done, ms));
const load = url => new Promise(done => { view.onload = () => done(view.contentDocument); view.src = url; });
(async () => {
  const found = {pages: 0, pictures: 0, wrong: []};
  for (const page of PAGES) {
    const shown = await load(page);
    found.pages += 1;
    if (!shown.querySelector("h1")) found.wrong.push(page + ": no heading");
    for (const img of shown.querySelectorAll("article img")) {
      img.loading = "eager";
      try { await img.decode(); } catch (error) { }
      found.pictures += 1;
      if (!img.naturalWidth) found.wrong.push(page + ": picture " + img.getAttribute("src"));
    }
  }
  for (const [text, target] of Object.entries(SEARCHES)) {
    const shown = await load("search.html?q=" + encodeURIComponent(text));
    let links = [];
    for (let k = 0; k < 100 && !links.some(link => link.includes(target + ".html")); k++) {
      await wait(100);
      links = [...shown.querySelectorAll("#search-results a")].map(link => link.getAttribute("href"));
    }
    if (!links.some(link => link.includes(target + ".html")))
      found.wrong.push("search for " + text + ": " + links.length + " results, " + target + " is not among them");
  }
  await fetch("__found__", {method: "POST", body: JSON.stringify(found)});
})();
</script>
"""


class Handler(http.server.SimpleHTTPRequestHandler):
    """The folder's files, the page that looks at them, and what it found."""

    def __init__(self, *arguments: object, found: queue.Queue[bytes], **options: object) -> None:
        self.found = found
        super().__init__(*arguments, **options)

    def do_POST(self) -> None:
        self.found.put(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(204)
        self.end_headers()

    def do_GET(self) -> None:
        if self.path != "/__check__.html":
            super().do_GET()
            return
        root = Path(self.directory)
        pages = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.html"))
        pages = [page for page in pages if not page.startswith("_") and Path(page).name != "search.html"]
        text = SCRIPT.replace("PAGES", json.dumps(pages)).replace("SEARCHES", json.dumps(SEARCHES)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *arguments: object) -> None:
        """Says nothing."""


def main() -> int:
    """The command line; 1 if something is wrong, 2 if there is no browser."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--browser", default=shutil.which("chromium") or shutil.which("chromium-browser"))
    parser.add_argument("--timeout", type=int, default=300, metavar="SECONDS")
    options = parser.parse_args()
    if not options.browser:
        print("no Chromium here: apt-get install chromium, or --browser PATH", file=sys.stderr)
        return 2
    told: queue.Queue[bytes] = queue.Queue()
    handler = functools.partial(Handler, directory=str(options.folder.resolve()), found=told)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, tempfile.TemporaryDirectory() as profile:
        server.handle_error = lambda *_: None  # the browser leaves a page before all of its pictures have come
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [options.browser, "--headless", "--disable-gpu", f"--user-data-dir={profile}"]
        command += ["--no-sandbox"] if os.geteuid() == 0 else []  # which Chromium asks of root
        command += ["--remote-debugging-port=0", f"http://127.0.0.1:{server.server_port}/__check__.html"]
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            found = json.loads(told.get(timeout=options.timeout))
        except queue.Empty:
            print(f"the browser did not come to an end in {options.timeout} s", file=sys.stderr)
            return 1
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()
    print(f"{found['pages']} pages, {found['pictures']} pictures, {len(SEARCHES)} searches")
    print("\n".join(found["wrong"]) or "all as they should be")
    return int(bool(found["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
