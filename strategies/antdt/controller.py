from strategies.antdt.actions import *


class Controller:
    def __init__(self, solution, *, world_size, global_batch, caps=None, decide_every=10.0, **kw):
        few, more = divmod(global_batch, world_size)
        self._plan = {
            "version": 0,
            "batch": [few + (i < more) for i in range(world_size)],
            "cap": list(caps or [None] * world_size),
        }
        self.solution = solution
        self.decide_every = decide_every
        self.log = []
        self.events = []
        self.steps = 0

    plan = property(lambda s: s._plan)

    def join(self, *a, **k):
        pass

    def report(self, node, samples, now, **k):
        self.steps = max([self.steps] + [s[0] for s in samples])

    def progress(self, *a):
        pass

    def tick(self, now):
        out = []
        for a in self.solution.decide(self.steps, now):
            v = Versioned(len(self.log) + 1, a)
            self.log.append(v)
            out.append(v)
            self.events.append(v.to_json())
            if isinstance(a, AdjustBatch):
                self._plan = {"version": v.version, "batch": list(a.batch), "cap": list(a.cap)}
        return out

    def actions_after(self, version, node):
        return [v for v in self.log if v.version > version and v.node in (None, node)]

    def applied(self, *a):
        pass

    def state_dict(self):
        return {"plan": self._plan, "log": [v.to_json() for v in self.log]}

    def load_state_dict(self, s):
        self._plan = s["plan"]
        self.log = [Versioned.from_json(v) for v in s["log"]]
