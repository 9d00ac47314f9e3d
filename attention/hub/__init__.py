"""The Hub: downloads that resume and are verified, known files, model cards, uploads."""
