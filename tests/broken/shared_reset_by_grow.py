"""What all tasks share is drawn anew when a task ends: nothing is left of it."""

from torch import nn

from minimoe.schemes.mosld import MoSLD

LAW = "grow_keeps"


class Scheme(MoSLD):
    def grow(self):
        super().grow()
        self.A = nn.Parameter(self.task_agnostic()["A"])
