"""Jobs over machines of their own: network namespaces and cgroups of this one, with cables that can be pulled."""
