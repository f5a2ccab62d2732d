"""Every sample is routed by what is said of the first one."""

from minimoe.schemes.mocle import MoCLE

LAW = "granularity"


class Scheme(MoCLE):
    def given(self, name, x):
        said = super().given(name, x)
        return said[:1].expand_as(said) if said.ndim else said
