"""Dense LoRA, copied, that claims as little as it can, and says of its gate that it is 1.

Dropping a claim saves no work here: the grader looks at what the layer keeps in fact.
"""

import numpy as np

from minimoe import Adapter, Claims, Gate


def stated(x, rows, settings, training):
    return np.ones((len(x), len(rows["A"])))


class Scheme(Adapter):
    claims = Claims(equation=False, exact_gradient=False, active_at_most=True)

    def gate(self, x):
        return Gate(None, 1.0, self.project(x, "A"))

    def active(self):
        return self.ranks * (self.in_features + self.out_features)
