"""# Submit with arena

Judges the competition's test file with the judges of a bundle, without internet, and leaves `submission.csv`. The
bundle's dataset, the competition and the base model have to be among the inputs, and the accelerator is GPU T4 x2.
"""

# %% What may be changed
import os
import subprocess
import sys
import tempfile
from pathlib import Path

INPUT = Path("/kaggle/input")
OUT = Path("/kaggle/working/submission.csv")
DEADLINE = "8.5h"  # from when judging begins; Kaggle stops the notebook after 9 hours
BASE = ""  # where the base is below INPUT, such as gemma-2/transformers/gemma-2-9b-it/2; empty: the judges need none
SETTINGS: list[str] = []  # such as packing.budget=8192, which takes less memory, or model.dtype=float32


# %% Find the inputs, and install what the image lacks
def below(*patterns: str) -> list[Path]:
    """The files of such names below INPUT, wherever Kaggle mounts an input."""
    found = [Path(folder, name) for folder, _, names in os.walk(INPUT, followlinks=True) for name in names]
    return sorted(each for each in found if any(each.match(pattern) for pattern in patterns))


def only(found: list[Path], what: str) -> Path:
    if len(found) != 1:
        there = ", ".join(map(str, found)) or "none"
        raise ValueError(f"there must be one {what} below {INPUT}, but there is {there}: correct the notebook's inputs")
    return found[0]


bundle = only(below("arena-bundle.json"), "bundle").parent
test = only(below("test.csv", "test.parquet", "test.jsonl"), "test file")
install = ["install", "--quiet", "--no-index", "--no-deps", "--require-hashes", "--find-links", str(bundle / "wheels")]
subprocess.run([sys.executable, "-m", "pip", *install, "-r", str(bundle / "requirements.txt")], check=True)

# %% Judge
words = [f"data.cache={tempfile.mkdtemp()}"]
if BASE:
    inside = [each for each in below("config.json", "*.gguf") if f"/{BASE.lower()}/" in each.as_posix().lower()]
    base = only(inside, f"base in {BASE}")
    words.append(f"model.base={base if base.suffix == '.gguf' else base.parent}")
limits = ["--deadline", DEADLINE]  # one process for each GPU
places = ["--recipe", str(bundle / "judges"), "--data", str(test), "--out", str(OUT)]
judge = [sys.executable, "-m", "arena.cli", "infer", *places, *limits, *words, *SETTINGS]
offline = {**os.environ, "HF_HUB_OFFLINE": "1"}  # what is missing is not to be waited for
OUT.unlink(missing_ok=True)
if status := subprocess.run(judge, check=False, env=offline).returncode:
    print(f"judging ended with status {status}: the submission has only what was judged before; see the error above")

# %% Look at the submission
print(*OUT.read_text(encoding="utf-8").splitlines()[:5], sep="\n")
