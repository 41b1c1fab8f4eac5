"""Network parts: attention behind one seam, rotary time, modulation, the space-time transformer, vocabularies."""
