"""What the nodes need of ComfyUI: files, memory, progress, CLIP and VAE objects.

Besides the comfy_*.py files and registry.py, the modules in here are the only ones that import ComfyUI, so that
everything else runs, is trained and is tested without it.
"""
