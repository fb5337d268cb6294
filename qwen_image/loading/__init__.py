"""From a hub id, folder or file to weights in memory."""
