"""Every headline claim as a command: ``python -m benchmarks.<claim>`` measures it and writes its birth certificate."""

import os

# Before torch is imported: threads that wait for one another spin for a moment only, then sleep. GNU's default is to spin
# for long, which beside any other busy process slows small networks down several times.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
