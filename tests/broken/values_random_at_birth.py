"""Keys and values both start random: adding the adapter changes the model."""

from minimoe import MoRA

LAW = "zero_at_birth"


class Scheme(MoRA):
    def fresh(self):
        rows = super().fresh()
        return rows | {"B": rows["B"].normal_(std=0.02)}
