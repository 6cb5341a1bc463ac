"""What drawing pictures from texts needs: captions, noise, the pipeline that draws."""
