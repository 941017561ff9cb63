from abc import ABC
from zoo.hyperparameters import Configurable


class Solution(Configurable, ABC):
    def decide(self, view, now):
        return []

    def state_dict(self):
        return {}

    def load_state_dict(self, s):
        pass


class AntDTND(Solution):
    def __init__(self, **kw):
        pass


class StaticBSP(Solution):
    def __init__(self):
        pass


class BackupWorkersSolution(Solution):
    pass
