"""The demos behind `esper-fx demo`: a network that grows while it trains, on images or on text.

May import esper_fx's public surface only; nothing but the command line imports it. The plot and the images need the
extra `esper-fx[demo]`.
"""
