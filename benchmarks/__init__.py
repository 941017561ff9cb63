"""Every headline claim as a command: ``python -m benchmarks.<claim>`` measures it and writes its birth certificate."""

import os

# Before torch is imported: threads that wait for one another then sleep. By default they spin, which on a machine that
# does anything else beside slows small networks down by a factor of ten and more.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
