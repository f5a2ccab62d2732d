from cosine_gate import CosineGate

from minimoe.laws.testing import laws_of

test_laws = laws_of(CosineGate)
