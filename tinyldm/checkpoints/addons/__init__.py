"""Small files that change a loaded model: LoRAs and textual inversions."""
