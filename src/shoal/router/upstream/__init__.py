"""Replicas that are other people's servers: anything that speaks OpenAI's API over HTTP.

Their text is passed on as it comes; nothing here holds a tokenizer.
"""
