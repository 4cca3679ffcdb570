"""Exports: what inference runtimes really run of a mask. One module a target (`grace_opt.export.target`)."""
