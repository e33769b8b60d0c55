"""Serve the documentation site on this machine, and build it again whenever nbs/
changes.

    python tools/preview.py [--port 4200]

A build that fails is printed, and the last good site stays. Reload the page to see a
new build; Ctrl-C stops."""

import argparse
import signal
import subprocess
import sys
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from watchdog.events import FileSystemEventHandler
from watchdog.observers import Observer

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {".ipynb", ".yml", ".css", ".py", ".svg", ".png"}


class Quiet(SimpleHTTPRequestHandler):
    "Serves files, never from the browser's cache, and prints nothing for each."

    def log_message(self, *args):
        pass

    def end_headers(self):
        self.send_header("Cache-Control", "no-store")
        super().end_headers()


class Changes(FileSystemEventHandler):
    """Sets `changed` when a source changes; what editors leave for a moment does not
    count."""

    def __init__(self):
        self.changed = threading.Event()

    def on_any_event(self, event):
        if event.event_type in ("opened", "closed_no_write"):
            return
        for path in (
            Path(path).relative_to(ROOT)
            for path in (event.src_path, event.dest_path)
            if path
        ):
            if path.suffix in SOURCES and not any(
                part.startswith(".") for part in path.parts
            ):
                self.changed.set()


def build(site: Path) -> bool:
    "Build in a process of its own, which reads the notebooks and the library afresh."
    command = [
        sys.executable,
        ROOT / "tools/build_docs.py",
        "--engine",
        "smalldocs",
        "--output",
        site,
    ]
    return subprocess.run(command).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Serve the documentation site and rebuild it on change."
    )
    parser.add_argument("--port", type=int, default=4200, help="0: any free one")
    port, changes, observer = parser.parse_args().port, Changes(), Observer()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs are born deaf to it
    with tempfile.TemporaryDirectory(prefix="grpo_nb_preview_") as folder:
        site = Path(folder) / "site"
        site.mkdir()
        server = ThreadingHTTPServer(
            ("127.0.0.1", port), partial(Quiet, directory=site)
        )
        threading.Thread(target=server.serve_forever, daemon=True).start()
        observer.schedule(changes, ROOT / "nbs", recursive=True)
        observer.start()
        try:
            while True:
                if build(site):
                    print(
                        f"http://127.0.0.1:{server.server_port}/ (Ctrl-C stops)",
                        flush=True,
                    )
                else:
                    print("the build failed; waiting for the next change", flush=True)
                changes.changed.wait()
                while (
                    changes.changed.is_set()
                ):  # until a second has passed without another change
                    changes.changed.clear()
                    changes.changed.wait(1)
                print("nbs/ has changed, building", flush=True)
        except KeyboardInterrupt:
            print("\nstopped")
        finally:
            observer.stop()
            server.shutdown()


if __name__ == "__main__":
    main()
