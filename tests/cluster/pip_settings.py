"""pip_settings.py DIR: this machine's pip settings as DIR/pip.conf, for an image that is built.

Prints the options of `apptainer build` that bind it, the certificates and every local directory of
packages below /mnt; what is bound is no part of the image. Standard library only.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

work = Path(sys.argv[1])
mount = work / "mnt"
mount.mkdir()
KEYS = (
    "index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "proxy", "cert",
    "timeout", "retries",
)  # fmt: skip
"""Where packages come from; settings of other kinds are this machine's own business."""
settings: dict[str, str] = {}
listed = subprocess.run(
    [sys.executable, "-m", "pip", "config", "list"], check=True, capture_output=True, text=True
).stdout
# The environment comes last: it wins, as it does in pip.
for line in sorted(listed.splitlines(), key=lambda text: text.startswith(":env:")):
    name, _, value = line.partition("=")
    key = name.rpartition(".")[2].replace("_", "-")
    if key in KEYS:
        settings[key] = str(ast.literal_eval(value))
certificates = settings.get("cert", "/etc/ssl/certs/ca-certificates.crt")
if Path(certificates).exists():
    shutil.copy(certificates, mount / "ca.crt")
    settings["cert"] = "/mnt/ca.crt"
local = {
    Path(word.removeprefix("file://"))
    for value in settings.values()
    for word in value.split()
    if word.removeprefix("file://").startswith("/") and Path(word.removeprefix("file://")).is_dir()
}
# The pages of a local index point to files beside it.
roots = {path.parent if path.name == "simple" else path for path in local}
for key, value in settings.items():
    words = []
    for word in value.split():
        path = Path(word.removeprefix("file://"))
        words.append(word.replace(str(path), f"/mnt{path}") if path in local else word)
    settings[key] = "\n    ".join(words)
text = "[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items())
(mount / "pip.conf").write_text(text)
print(f"--bind\n{mount}:/mnt")
for root in sorted(roots):
    os.makedirs(f"{mount}{root}", exist_ok=True)
    print(f"--bind\n{root}:/mnt{root}:ro")
