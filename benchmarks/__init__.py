"""Every headline claim as a command: ``python -m benchmarks.<claim>`` measures it and writes its birth certificate."""

from zoo.cli.process import tune_process

tune_process()  # before torch is imported
