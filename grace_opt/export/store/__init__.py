"""Stored and transferred caches: the keys and values of a prompt in a fraction of their bytes, and back to full width.

from grace_opt.export.store import KVStore
store = KVStore.open("out/")                    # what grace-opt export --to kv-store wrote
store.save(store.prefill(model, ids), "prompt.kv")
past = store.load("prompt.kv")                  # a DynamicCache: any attention runs on it
"""

from grace_opt.export.store.store import KVStore

__all__ = ["KVStore"]
