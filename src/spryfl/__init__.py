"""Finetune language models across clients whose data stays private and whose memory is small."""
