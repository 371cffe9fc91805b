"""The benchmarks: our batches beside what people use, on the same weights, rows and precision."""

import time

STARTED = time.time()  # the minutes of a call count from here, so that importing torch takes some of them
