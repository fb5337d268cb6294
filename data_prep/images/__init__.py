"""One image: decoded, upright, sRGB, resized into its bucket, encoded."""
