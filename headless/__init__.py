"""ComfyUI without its window: a server process of one's own and a small HTTP and websocket client for it."""
