"""Single parts, each with its variants in turn: what the choices in docs/performance.md rest on.

rows = PARTS['rmsnorm'](case, config, progress)     # {row: {'unit': 'ms', 'variants': {name: spread}}}
"""

PARTS = {}
