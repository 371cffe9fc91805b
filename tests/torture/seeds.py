"""The same seed twice: from nothing to the submission, bit for bit; and another seed as the control."""

from __future__ import annotations

from tests.torture.ground import Found, Ground, differs, done


def same_twice(ground: Ground) -> Found:
    found = Found("same seed twice", "bit-equal weights and probabilities on one machine")
    for turn in range(ground.times(3)):
        place = ground.place(f"seeds/{turn}")
        done(ground.train(place / "runs"), place / "shown.txt")
        done(ground.infer(place / "submission.csv", place / "runs"), place / "shown.txt")
        why = differs(ground, place / "runs")
        if (place / "submission.csv").read_bytes() != ground.submission:
            why = "another submission"
        found.count(why)
    place = ground.place("seeds/other")
    done(ground.train(place / "runs", "seed=1"), place / "shown.txt")
    odd = differs(ground, place / "runs") or ""
    if "weights.safetensors" not in odd or "oof.csv" not in odd:
        found.failures.append("the control, another seed, came to the same weights")
    found.note = "weights, adapter, log, oof.csv and submission; another seed (the control) gives others"
    return found
