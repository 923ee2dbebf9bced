"""How low the loss gets with each optimizer, and at how much memory: ``python -m bench.quality``.

`tasks` and `images` are what is trained, `contenders` the optimizers, `runs` one training run; `grid` says which runs a
study still needs, `study` keeps them in a folder, one file each, and trains what is missing, `progress` says how long
that takes; `tables` and `pictures` are made of the finished runs. `scale` is a larger model on one GPU.
"""
