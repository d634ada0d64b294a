"""The demo in the browser: a page on which a network draws and restores images, shown step by step (extra ``demo``).

``restorer`` computes, and knows nothing about the page; ``page`` has the layout and runs the server. Only functions of
``page`` import Gradio.
"""
