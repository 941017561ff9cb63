"""Every headline claim as a command: ``python -m benchmarks.<claim>`` measures it and writes its birth certificate."""
