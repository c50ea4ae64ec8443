"""What a folder of edits has beside its tensors, the ledger and cards: begin with ledger.py."""
