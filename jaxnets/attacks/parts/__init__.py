"""What attacks are made of.

For every attack: `calling` (keys, checks), `derivatives`, `ranking` (which point is better, which nearer), `start`,
`stochastic` (models that draw), `queries`. For iterated ones: `rules` (what is done with a gradient), `apgd_steps`. For
the smallest perturbation: `minimum_norm`, `penalty` (searches over constants), `hyperplane` (linearised boundaries).
Without gradients: `decisions` (labels alone), `compaction` (a loop that drops rows that are done). Outside of jit:
`on_host`.
"""
