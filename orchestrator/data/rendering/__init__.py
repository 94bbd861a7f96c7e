"""Examples -> texts by the chat template -> token ids and the mask of supervised tokens.

template     start here: examples -> token ids and the mask of supervised tokens
chat         a conversation as the chat template writes it
turnwise     the compiled template, and where each turn begins in what it writes
supervision  what of a row is supervised, as pure functions over text
together     renderings that wait for token ids: tokenised in one call
"""
