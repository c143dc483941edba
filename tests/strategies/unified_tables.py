"""Small ``unified`` tables."""

from embcomp import TableSpec, UnifiedConfig, build_tables


def make_specs(*sizes, dim=4, **options):
    return [TableSpec(f"t{index}", size, dim, **options) for index, size in enumerate(sizes)]


def make_tables(specs, pool_rows, exempt="none", **options):
    return build_tables(specs, UnifiedConfig(pool_rows=pool_rows, exempt=exempt, **options))


# ---- lookups against an independent, slow reference ------------------------------------------------------------------
