"""The drawn data set, registered with MMDetection and MMSegmentation."""
