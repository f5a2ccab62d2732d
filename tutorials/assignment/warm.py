"""Imported once, by the server that processes are forked from: what each of them would need seconds
for. The draw has hypothesis read its sources."""

import inside  # noqa: F401
import torch._dynamo

from minimoe import LoRA
from minimoe.laws.case import cases
from minimoe.laws.check import drawn

torch.set_num_threads(1)
drawn("", lambda case: None, cases(LoRA, {}, LoRA.claims), 30)
