"""Every sample is routed by what is said of the first one."""

from minimoe import MoCLE

LAW = "granularity"


class Scheme(MoCLE):
    def hear(self, name, x):
        said = super().hear(name, x)
        return said[:1].expand_as(said) if said.ndim else said
